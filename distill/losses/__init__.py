"""What is learnt: the losses, each one value per image, and the objective that weighs them."""
