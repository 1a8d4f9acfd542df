"""Networks, distributions and what they are laid out on."""
