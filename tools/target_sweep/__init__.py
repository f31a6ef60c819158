"""Trying single operators on what programs are written for."""
