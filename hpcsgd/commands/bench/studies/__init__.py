"""Studies compare many training runs: `hpcsgd bench async`, `ps`, `straggler` and `scale`."""
