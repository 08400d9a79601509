"""The building blocks of models. Each names the checkpoint tensors it wants: `weight_targets(prefix)`."""
