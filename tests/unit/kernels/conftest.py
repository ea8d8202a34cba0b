"""Imports triton for its interpreter while tests are collected, before anything else can import it without."""

from support.triton_interpreter import has_triton, import_interpreted

if has_triton():
    import_interpreted()
