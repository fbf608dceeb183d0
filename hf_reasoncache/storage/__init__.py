"""Where keys and values lie; knows no policy."""
