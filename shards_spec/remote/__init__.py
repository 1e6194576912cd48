"""Shard sets and files at URLs."""
