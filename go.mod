module pyro

go 1.26
