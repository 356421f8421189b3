"""What a training needs: batches, augmentation, losses, the weight map, optimisers, its log."""
