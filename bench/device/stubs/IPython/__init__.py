"""Stands in for IPython, of which SGLang imports the display functions and uses none here."""
