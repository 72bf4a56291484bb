"""Tests, and what they share with benchmarks: what measures compiled programs."""
