"""The methods of `tokenferry bench`: what is measured, how, and what the results are checked against."""
