"""WeCLIP: frozen CLIP for weakly supervised semantic segmentation."""
