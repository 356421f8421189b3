"""What a training needs: batches, augmentation, losses, optimisers, its log."""
