"""Ember accelerated: what is learned and computed from what the models answered."""
