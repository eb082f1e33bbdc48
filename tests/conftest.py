"""Settings of every test: no hub, no telemetry, the laptop profile; and the two known messages silenced, no others."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("SPARK_FT_PROFILE", "laptop")


def pytest_configure(config):
    # pytest resets warning filters for each test, so its own setting has to hold this one;
    # importing spark_ft.lab filters bitsandbytes' log message.
    config.addinivalue_line("filterwarnings", "ignore:.*is_gradient_checkpointing:FutureWarning")
    import spark_ft.lab  # noqa: F401
