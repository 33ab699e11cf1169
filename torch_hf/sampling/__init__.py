"""Batches that grow: samplers, growth rules, and batches cut into parts."""
