"""One routing policy per file behind `base.Policy`; which one runs is a flag of the router."""
