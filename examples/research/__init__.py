"""The scripts behind the tables of the documentation; README.md lists them."""
