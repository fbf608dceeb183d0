"""SmolLM2-135M-Instruct: pretrained weights from the package index, and a profile of them."""
