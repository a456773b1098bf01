"""Plans: which plugins serve a request, which hooks they implement, and how hooks are called."""
