# Hashes, regular expressions, sorting, string building, forks.
use strict;
use warnings;

my $state = 42;
sub next_random { $state = ($state * 1103515245 + 12345) % 2147483648; return $state; }

sub checksum {
    my $sum = 0;
    $sum = ($sum * 31 + unpack("%32C*", $_)) % 4294967291 for @_;
    return $sum;
}

my %table;
for my $i (1 .. 150_000) {
    my $key = "key" . (next_random() % 60_000);
    push @{ $table{$key} }, $i;
    delete $table{"key" . (next_random() % 60_000)} if $i % 5 == 0;
}
print "hash ", scalar(keys %table), " ",
    checksum(map { "$_=@{$table{$_}}" } sort keys %table), "\n";

my $text = join " ", map { sprintf "word%d:%x", $_ % 1009, next_random() } 1 .. 80_000;
my %seen;
$seen{$1} += length $2 while $text =~ /\b(word\d*[02468]):([0-9a-f]+)\b/g;
(my $changed = $text) =~ s/(\d+):([a-f]+)/$2<$1>/g;
print "regex ", scalar(keys %seen), " ", checksum(map { "$_$seen{$_}" } sort keys %seen), " ",
    length($changed), " ", checksum($changed), "\n";

my @numbers = map { next_random() } 1 .. 150_000;
print "sort ", checksum(map { "$_" } (sort { $a <=> $b } @numbers)[map { $_ * 1000 } 0 .. 149]), " ",
    checksum((sort map { scalar reverse "$_" } @numbers)[0 .. 500]), "\n";

my $built = "";
for my $i (1 .. 400_000) {
    $built .= chr(97 + $i % 26) x ($i % 7);
    substr($built, 0, 50_000, "") if length $built > 200_000;
}
print "built ", length($built), " ", checksum($built), "\n";

my @grid = map { my $row = $_; [ map { $row * $_ % 251 } 0 .. 499 ] } 0 .. 499;
my @transposed = map { my $column = $_; [ map { $grid[$_][$column] } 0 .. 499 ] } 0 .. 499;
print "grid ", checksum(map { join ",", @$_ } @transposed), "\n";

for my $child (1 .. 12) {
    pipe(my $from, my $to) or die "pipe: $!";
    my $pid = fork() // die "fork: $!";
    if (!$pid) {
        close $from;
        my %own = map { $_ => "x" x ($_ % 100) } 1 .. 10_000 + $child;
        print $to scalar(keys %own), " ", checksum(map { $own{$_} } sort { $a <=> $b } keys %own), "\n";
        close $to;
        exit $child;
    }
    close $to;
    print "child $child ", <$from>;
    waitpid $pid, 0;
    print "status ", $? >> 8, "\n";
}
print "shell ", scalar(`seq 1 1000 | wc -l`);
