"""Distillation: a student of a UNet learns its teacher's predictions again."""
