"""Training: sampler, batches, augmentation, losses, weight map, optimisers, state, budget and log."""
