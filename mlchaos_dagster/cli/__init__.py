"""`mlchaos`: one module per subcommand, imported when it is called, so that help, list and check start fast."""
