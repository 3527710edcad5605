"""Records of results files and the schemas made from them."""
