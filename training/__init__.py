"""Training: patches, batches, augmentation, losses, weight map, optimisers, state, progress and log."""
