"""The truth, told later: predictions kept until their horizon, the labels told meanwhile, and how
good the predictions were."""
