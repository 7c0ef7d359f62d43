"""Stands in for Sophgo's `sophon` package in tests: put the folder above this one on the import path."""
