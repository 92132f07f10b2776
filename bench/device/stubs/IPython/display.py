"""Names that SGLang imports."""

HTML = display = None
