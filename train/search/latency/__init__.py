"""Latency of structures: measured on the deployed engine, kept in a table, predicted by a model.

* records.py: a measured latency, and where it was measured.
* table.py: measured latencies in a file, which is refused elsewhere.
* measure.py: the structures to measure, and their measurement.
* model.py: prediction for all other structures, checked on those that were held out.
* study.py: the plan, its table and its model, which structures of the model's own front join.
"""
