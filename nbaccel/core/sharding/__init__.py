"""Models divided over ranks: by rows of each tensor, by matrices, by layers, by pieces of a sequence."""
