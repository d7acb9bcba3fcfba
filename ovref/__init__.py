"""ovref builds reference collections for training-free open-vocabulary segmentation."""
