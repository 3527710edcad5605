"""What the documentation site shows beyond prose: blocks of its pages and the data that its scripts draw."""
