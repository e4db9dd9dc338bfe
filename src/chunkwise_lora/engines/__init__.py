"""Engines run models by plans. An engine is imported only when it is used."""
