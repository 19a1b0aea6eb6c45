"""Sandboxes that outlive the program that started them, as seen from outside: their names, directories and connections.

What runs inside, the process that owns the virtual machine, is :mod:`pykata.keeper`.
"""
