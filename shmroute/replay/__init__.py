"""Routes in a trainer's routers: one module for each trainer, imported by its name.

Nothing is imported here, so that each needs only its own trainer.
"""
