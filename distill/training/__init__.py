"""How it is learnt: the loop, its step, order and batches, what it leaves behind."""
