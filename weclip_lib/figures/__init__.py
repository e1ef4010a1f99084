"""Figures of matplotlib, and small pictures for the explorers."""
