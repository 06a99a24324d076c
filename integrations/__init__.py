"""One adapter per trainer, each with a class named ``PDiffRecorder``.

Installed as ``pdiff_plugin.integrations``. Importing this package imports no trainer.
"""
