"""Training: sampler, batches, augmentation, losses, weight map, optimisers, state, saver, budget and log."""
