"""The experiments, a module per lab; `spark_ft.lab.experiments` runs them."""
