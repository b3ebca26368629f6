"""What proves and describes an installation: self-test, inspection of GPU code, facts about the machine, tables."""
