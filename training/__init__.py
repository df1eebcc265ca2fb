"""What trains the models that Tandem ships. Nothing that serves imports it."""
