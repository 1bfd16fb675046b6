"""Stages of the measurements of servers: see serving_load.py and serving_peers.py."""
