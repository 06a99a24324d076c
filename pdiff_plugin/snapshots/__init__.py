"""Snapshots on disk: the layout that maps tensors to a flat vector, and the store that keeps them."""
