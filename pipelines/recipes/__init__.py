"""Recipes that a checkout has and an installation does not: how shipped models were made."""
