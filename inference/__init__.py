"""The light half of ovref: opens and queries reference collections, and segments with them."""
