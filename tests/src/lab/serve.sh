#!/bin/sh
# Runs the commands that arrive on its standard input, the lab's second serial line, one after the other.
#
# A request is a line "LENGTH SECONDS" and a command of LENGTH bytes; the answer is a line "STATUS LENGTH" and LENGTH bytes
# of output, STATUS being the exit status, or "late" when the command did not end within SECONDS and was killed with its
# process group. What a command leaves running in the background goes on; its later output is lost.
stty raw -echo 115200
mkdir /run/lab
cd /run/lab || exit 1
echo LAB-UP

while read -r length seconds; do
    head -c "$length" >command
    rm -f output late
    (cd /root && exec setsid sh /run/lab/command) </dev/null >output 2>&1 &
    command=$!
    setsid sh -c "sleep $seconds; : >late; kill -KILL -$command" &
    watchdog=$!
    wait $command
    status=$?
    # It may be its group's leader already or not yet; left behind, it would call a later command late.
    kill -KILL -$watchdog 2>/dev/null || kill -KILL $watchdog
    [ -e late ] && status=late
    size=$(wc -c <output)
    echo "$status $size"
    head -c "$size" output
done
