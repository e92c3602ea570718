"""What routing and experts do, as numbers: no figures and no HTML."""
