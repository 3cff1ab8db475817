"""One model on one rank, whatever spreads it: its tied and composed tensors, its blocks, how it computes."""
