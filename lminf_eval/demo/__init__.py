"""The demo: a real model inside and beyond its training length."""
