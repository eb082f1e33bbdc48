"""Side by side with PEFT and TRL, in one run: harness, cases, and the peers themselves."""
