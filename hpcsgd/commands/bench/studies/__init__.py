"""Studies: many training runs compared, `hpcsgd bench async`, `ps`, `straggler` and `scale`."""
